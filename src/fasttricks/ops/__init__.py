"""One file an op: the public function, its fake, autograd and autocast, and the choice of backend."""
