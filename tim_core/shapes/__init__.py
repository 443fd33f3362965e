"""Coloured shapes, the demo model's data: scenes, renderer, detector, tokenizer, batches."""
