package runtime

import "testing"

func TestParseFolders(t *testing.T) {
	for _, c := range []struct{ name, config, conf, bin string }{
		{"containerd 1.6 of Debian", `{"cni":{"binDir":"/usr/lib/cni","confDir":"/etc/cni/net.d","maxConfNum":1}}`, "/etc/cni/net.d", "/usr/lib/cni"},
		{"containerd 2.1", `{"cni":{"binDir":"","binDirs":["/opt/cni/bin"],"confDir":"/etc/cni/net.d"}}`, "/etc/cni/net.d", "/opt/cni/bin"},
		{"another runtime", ``, "", ""},
		{"no JSON", `sandboxImage = "x"`, "", ""},
		{"half of it", `{"cni":{"binDir":"/opt/cni/bin"}}`, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			conf, bin, err := parseFolders(c.config)
			if conf != c.conf || bin != c.bin || (err == nil) != (c.conf != "") {
				t.Errorf("parseFolders = %q, %q, %v", conf, bin, err)
			}
		})
	}
}
