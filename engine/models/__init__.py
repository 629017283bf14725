"""The SCAIL models: transformer, VAE, text and image encoders, and their checkpoints."""
