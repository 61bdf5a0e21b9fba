// Package exchange is what two nodes tell each other directly, over the
// underlay and never through the tunnel it is about: the preshared key of each
// pair of WireGuard keys, and to which key a node sends, which a node that
// changes its key has to know (package datapath).
//
// # Who is who
//
// Each node has a TLS key of its own, and publishes the hash of it (a pin) and
// its port on its Node object. Both ends of a connection show a self-signed
// certificate and are known by its pin alone, so that the only root of trust
// is the API that says who may write which Node. That works the same way
// whoever serves the API. TLS 1.3 with X25519MLKEM768 is required.
//
// # The preshared key
//
// The node whose name sorts lower begins. It sends an ML-KEM-768 encapsulation
// key made for this once, the other answers with the ciphertext, and both
// derive by HKDF-SHA256 from the shared secret, with keying material exported
// from the TLS session as salt, both names and both WireGuard public keys: the
// preshared key, a word of confirmation each, and a public name of the key.
// So it holds if either of the two key agreements does. The other stores and
// uses it when it has the word of the first, the first when that was answered.
// When an answer is lost the first begins anew; a session of WireGuard goes on
// for 60 s at least without the handshake in which both have to agree.
//
// # No way back
//
// Two nodes that have had a preshared key never make a session without one
// again, whatever can be reached: a new WireGuard key of either gets no tunnel
// before it has a preshared key. Who forgets its own, or gets another Node
// object, starts anew. Two nodes that never had one wait for it a moment, and
// then go without and say so: a closed TCP port costs the protection against a
// later quantum computer, not the network.
package exchange
