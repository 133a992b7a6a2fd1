"""A site's machine: its folder, how it joins, the two processes that run there. Nothing of the server."""
