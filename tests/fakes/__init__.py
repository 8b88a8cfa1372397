"""Stand-ins for the rest of the world: a clock moved by hand, a scripted stage, a real upstream on loopback."""
