"""Group counts that leave a site, and Fairlearn's figures with intervals from them."""
