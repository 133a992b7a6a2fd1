"""Floor 4: what hosts and runs server blocks: sessions over one frozen backbone, and the process that serves them."""
