"""One vision network, many domains."""
