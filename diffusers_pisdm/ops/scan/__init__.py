"""The selective scan: one public function, and a file for each backend."""
