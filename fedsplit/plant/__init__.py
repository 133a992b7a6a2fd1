"""Floor 6: fedsplit left on a server and on sites' machines. `server` and `site` do not see each other; both stand on the files beside them."""
