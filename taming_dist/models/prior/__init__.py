"""The second stage: p(s | c) over the codes s of an image, given a condition c."""
