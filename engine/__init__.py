"""The SCAIL engine: a reference picture and a dance in, an animated clip out."""
