"""Training objectives: transition, distribution matching, distillation."""
