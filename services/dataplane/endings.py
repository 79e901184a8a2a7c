"""How the statuses of completions begin that are not `ok`: gateways and `kvplane complete` write, all gateways read them."""

FAILED = "failed: "
"""The engine failed: it is left out for a while when this happens again and again."""
REFUSED = "refused: "
"""The engine would not have the request, and no other would."""
CANCELLED = "cancelled"
"""The client gave it up."""
LONGEST = 512
