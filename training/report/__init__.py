"""What a run folder says, for people: the data to show, and one page that draws it."""
