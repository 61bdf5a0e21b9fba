package volume

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"time"
)

// tokenTimes reads from a JWT when it should be replaced (after four fifths of
// its life, a day at the most) and when it ends. Both are zero for what is not
// a token with times.
func tokenTimes(token string) (refresh, end time.Time) {
	parts := strings.Split(strings.TrimSpace(token), ".")
	if len(parts) != 3 {
		return
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return
	}
	var claims struct {
		Expires float64 `json:"exp"`
		Issued  float64 `json:"iat"`
	}
	if json.Unmarshal(b, &claims) != nil || claims.Expires <= claims.Issued || claims.Expires > 1e11 || claims.Issued < 0 {
		return
	}
	issued, end := time.Unix(int64(claims.Issued), 0), time.Unix(int64(claims.Expires), 0)
	life := min(end.Sub(issued)*8/10, 24*time.Hour)
	return issued.Add(life), end
}
