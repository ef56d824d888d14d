"""How published figures were measured: a JSON file each, and what reads them."""
