"""The wire between Pagewire's services: message types, sampling parameters and the channels that
carry them."""
