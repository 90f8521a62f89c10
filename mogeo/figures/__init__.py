"""Tables, charts and the HTML page of a run, for all subcommands. Knows numbers and text; no models and no data."""
