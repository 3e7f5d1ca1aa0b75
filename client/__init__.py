"""A site: it trains and evaluates on its own records, inside its policy and its ledger."""
