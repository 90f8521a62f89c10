"""`mogeo evaluate`: generate answers, have them judged, and estimate net win rates. Must not know training."""
