"""How good a trained model, or a set of images, is; every figure has its protocol."""
