"""Search what lies behind the frozen encoder: spaces, trials, Tune, and the report of what few tokens cost and give."""
