"""Read files from untrusted sources in bounded time and memory, without running code in them."""
