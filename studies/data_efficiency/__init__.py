"""How many images does a student need, with no teacher, with one, or with both? `study` trains, `report` writes."""
