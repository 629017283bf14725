"""Files in and out: pictures, videos and sound, and how they are framed for the network."""
