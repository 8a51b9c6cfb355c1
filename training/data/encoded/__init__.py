"""What encoders made of a data set: text states and latents, kept in shards of their own beside the images."""
