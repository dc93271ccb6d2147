"""The commands as they are typed: argv -> values -> calls. Heavy imports happen inside them."""
