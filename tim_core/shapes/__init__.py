"""TiM-Shapes, the small world: scenes, renderer, detector, tokenizer, batches."""
