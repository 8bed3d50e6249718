"""The live objects of a run on its device: model, optimizer, batches, ranks; a step, and the one door for changes."""
