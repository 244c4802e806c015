"""Images from a trained model: sampling codes, of any size and in parts, and decoding them."""
