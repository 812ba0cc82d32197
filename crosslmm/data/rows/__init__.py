"""Reads the rows of a manifest in any form: a file becomes raw rows (`files`), a raw row a conversation (`forms`)."""
