"""What the files of a checkpoint say that more than one service must know: which of them hold the
weights, which tokens end a text, what model they are. No tensors, no text, no network."""
