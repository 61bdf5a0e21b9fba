package cni

import (
	"errors"
	"net/netip"
)

func validateRange(p netip.Prefix) error {
	switch {
	case !p.IsValid():
		return errors.New("not a prefix: want one like 10.244.1.0/24")
	case p != p.Masked():
		return errors.New("address bits set behind the prefix: want " + p.Masked().String())
	case p.Addr().BitLen()-p.Bits() < 2:
		return errors.New("too small to take addresses from: want at least /30 or /126")
	}
	return nil
}
