"""Floor 4: the encoder host: sessions over one frozen backbone, and the process that serves it."""
