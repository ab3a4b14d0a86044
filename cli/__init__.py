"""The command line of llamamoe: parse, call one library function, print."""
