package status

import "time"

// Keys is what a node knows of keys, its own and those of its peers.
type Keys struct {
	Node string `json:"node"`
	// Key is the WireGuard public key, the Generation-th this node has.
	Key        string    `json:"key"`
	Generation int       `json:"generation"`
	Made       time.Time `json:"made"`
	// Stage of the change of the key: steady, leaving, returning.
	Stage string `json:"stage"`
	// Next key, while it changes.
	Next string `json:"next,omitempty"`
	// Wanted: the change begins as soon as it may.
	Wanted bool `json:"wanted,omitempty"`
	// Waiting for these nodes, and why.
	Waiting map[string]string `json:"waiting,omitempty"`
	// Due is when the schedule changes the key; zero without one.
	Due   time.Time `json:"due,omitzero"`
	Peers []KeyPeer `json:"peers"`
}

// KeyPeer is another node.
type KeyPeer struct {
	Node string `json:"node"`
	Key  string `json:"key"`
	// Changing is the stage of the change of its key.
	Changing string `json:"changing"`
	// Second is true when it is sent to over the second device.
	Second bool `json:"second,omitempty"`
	// PSKMade is when the preshared key in use was agreed; PSKWhy why there is
	// none.
	PSKMade time.Time `json:"pskMade,omitzero"`
	PSKWhy  string    `json:"pskWhy,omitempty"`
}
