"""The networks: transformer, autoencoder, text encoder, and their configurations."""
