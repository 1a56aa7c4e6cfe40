"""The four stages of the network, one file each, and the file that wires them."""
