"""What the sampling command reads and writes: requests, pictures, their folder and their recipe."""
