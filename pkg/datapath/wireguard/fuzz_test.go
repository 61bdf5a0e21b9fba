package wireguard

import "testing"

func FuzzParseKey(f *testing.F) {
	f.Add([]byte("yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=\n"))
	f.Add([]byte(""))
	f.Fuzz(func(t *testing.T, b []byte) {
		key, err := parseKey(b)
		if err != nil {
			return
		}
		if again, err := parseKey([]byte(key.String())); err != nil || again != key {
			t.Errorf("%q: %v, then %v, %v", b, key, again, err)
		}
	})
}
