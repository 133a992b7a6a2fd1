"""Floor 5: the Flower floor: orders and answers as records, the server's half, a site's half, engines."""
