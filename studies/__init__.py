"""Questions about training that only measuring answers; each study is a room that can be run again."""
