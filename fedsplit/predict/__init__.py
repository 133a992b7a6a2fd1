"""A module in use: what a trained module says of new inputs, how good that is, and the module as other programs load it.

No server, no Flower: a device, a line's machine or a notebook imports this.
"""
