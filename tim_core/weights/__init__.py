"""Weight files: read, recognise, load, convert, describe, download."""
