"""Side-by-side measurements, each a command: a table for people, and one JSON object as the last line."""
