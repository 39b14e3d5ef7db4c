"""What a run leaves and shares: results, cards, tables, and uploads to the Hub."""
