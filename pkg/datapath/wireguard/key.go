package wireguard

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"meshd.dev/pkg/durable"
)

// loadKey reads the private key at path, in the form of wg genkey, and makes
// one when there is none. A file that holds something else is moved aside to
// path.corrupt-<seconds> and a new key is made: a node that cannot start is
// worse than one whose peers learn a new key from its Node object. setAside
// is then the new name of the old file, for the operator to be told. Fresh
// says that the key was made now: nobody knows it yet.
func loadKey(path string) (key wgtypes.Key, fresh bool, setAside string, err error) {
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		key, err = makeKey(path)
		return key, true, "", err
	case err != nil:
		return key, false, "", fmt.Errorf("read private key: %w", err)
	}
	key, err = parseKey(b)
	if err == nil {
		return key, false, "", os.Chmod(path, 0o600)
	}
	setAside = fmt.Sprintf("%s.corrupt-%d", path, time.Now().Unix())
	if err := os.Rename(path, setAside); err != nil {
		return key, false, "", fmt.Errorf("set corrupt private key aside: %w", err)
	}
	key, err = makeKey(path)
	return key, true, setAside, err
}

// parseKey accepts 32 bytes in base64 with white space around, not all zero.
func parseKey(b []byte) (wgtypes.Key, error) {
	if len(b) > 256 {
		return wgtypes.Key{}, fmt.Errorf("private key: want 44 characters, have %d", len(b))
	}
	key, err := wgtypes.ParseKey(strings.TrimSpace(string(b)))
	if err != nil {
		return wgtypes.Key{}, fmt.Errorf("private key: want 32 bytes in base64: %w", err)
	}
	if key == (wgtypes.Key{}) {
		return wgtypes.Key{}, errors.New("private key: all zero")
	}
	return key, nil
}

func makeKey(path string) (wgtypes.Key, error) {
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return key, fmt.Errorf("make private key: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return key, fmt.Errorf("make private key: %w", err)
	}
	return key, writeKey(path, key)
}

func writeKey(path string, key wgtypes.Key) error {
	if err := durable.WriteFile(path, []byte(key.String()+"\n"), 0o600); err != nil {
		return fmt.Errorf("write private key: %w", err)
	}
	return nil
}
