package main

import (
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

func TestReadyIsSaidByUsAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer systemd.Close()
	t.Setenv(notifyVariable, path)

	hideNotifySocket()
	if sent, err := daemon.SdNotify(true, "READY=1\nSTATUS=of a library"); sent || err != nil {
		t.Errorf("a library says that we are ready: %v, %v", sent, err)
	}
	notifyReady()
	if err := systemd.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 128)
	n, err := systemd.Read(b)
	if got := string(b[:n]); got != "READY=1" || err != nil {
		t.Errorf("systemd hears %q, %v", got, err)
	}
	if sent, _ := daemon.SdNotify(false, daemon.SdNotifyReady); sent {
		t.Error("what meshd starts would find the socket")
	}
}
