"""What a suite asks of an encoder, one file a kind of task."""
