"""Networks and their mathematics on one device: the DiT, the video autoencoder, text encoders, diffusion."""
