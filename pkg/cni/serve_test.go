package cni

import (
	"fmt"
	"net"
	"os"
	"testing"
)

// TestHelperServes is a server in a pod, for tests that start this binary
// again: it says hello to everybody until it is killed.
func TestHelperServes(t *testing.T) {
	addr := os.Getenv("CNI_TEST_SERVE")
	if addr == "" {
		return // not started as one
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("listening")
	for {
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(c, "hello")
		c.Close()
	}
}
