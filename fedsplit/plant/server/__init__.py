"""The server of a federation: its folder, its services, who may join, how it stands."""
