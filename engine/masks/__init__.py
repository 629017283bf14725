"""Who is who in a picture: colour masks, from a file to the channels of the network."""
